"""What a training step costs in time and memory: measured (benchmark) or forecast."""
