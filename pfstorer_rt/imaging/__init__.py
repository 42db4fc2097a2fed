"""Images: files, colour profiles, rows and bands, colour correction, similarity metrics."""
