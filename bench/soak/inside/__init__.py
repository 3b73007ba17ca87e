"""A directory on the path of the mesh's processes: Python finds `sitecustomize` in it."""
