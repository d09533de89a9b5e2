"""What is done for the requests that wait."""
