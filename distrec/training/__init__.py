"""What one worker does (engine, loop, checkpoints, run folder) and the launch on Ray Train."""
