"""What assets and sensors are given: the artifact store and the experiment tracker."""
