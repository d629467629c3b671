"""What is kept on disk or at a URL: results, shared stages, the driver's lock and log."""
