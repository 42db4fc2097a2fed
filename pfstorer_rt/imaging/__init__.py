"""Images: files, colour profiles, rows and bands, colour correction, and how alike two are."""
