"""`unlatch serve`: start one unit or several on this machine, restart those that end, and stop them.

    supervisor ──> units (each a gateway and a replica, unlatch/unit/) ──> forkservers ──> workers

The system kills the units when the supervisor ends (PDEATHSIG), and the workers when their unit ends. So no process is
left behind, whichever of them is killed.
"""
