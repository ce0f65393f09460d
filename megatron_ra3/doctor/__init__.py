"""`ra3 doctor`: looks before a run does, and says what would stop or slow it, with the fix."""
