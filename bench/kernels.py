"""The bench's work as Unlatch kernels: `unlatch serve --kernels bench/kernels.py`."""

from bench import work
from unlatch import kernel

spin10 = kernel(pure=True)(work.spin10)
elementwise = kernel(pure=True)(work.elementwise)
python_loop = kernel(pure=True)(work.python_loop)
wait10 = kernel(pure=True)(work.wait10)
