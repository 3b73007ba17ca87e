"""The first module that the forkserver imports. It makes the forkserver end with the dispatcher.

multiprocessing's own way needs the forkserver to read a pipe, which it does not do while it imports kernels.
"""

import os

from unlatch.common.service.early import die_with_parent

die_with_parent(os.getppid())
