"""The gateway's two doors: the Open Inference Protocol, and lanes of Python clients."""
