"""`ra3 chaos`: break small runs in every way that breaks long ones, and compare them with one that nobody broke."""
