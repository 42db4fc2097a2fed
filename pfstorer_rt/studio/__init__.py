"""The studio: a page in the browser that restores pictures and learns people. Needs the extra `studio`."""
