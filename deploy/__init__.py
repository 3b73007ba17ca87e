"""How Unlatch is run: images, Kubernetes, and the Python that makes what is there."""
