"""What is measured of predictions and of embedding spaces, by definition."""
