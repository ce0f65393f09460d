"""What a run tells its operator: metrics, samples and the final table."""
