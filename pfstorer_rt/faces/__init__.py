"""Faces: where they are, whose they are (dlib, ArcFace), and how near a result is to a person."""
