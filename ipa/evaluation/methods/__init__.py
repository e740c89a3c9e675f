"""The systems of the paper's comparison behind one face: see ``method.Method``. One file each, or one for a shape."""
