"""Jobs and sensors."""
