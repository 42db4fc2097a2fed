"""Faces: detection, recognition (dlib, ArcFace), and the identity distance of a result to a person."""
