#!/usr/bin/env bash
# Run a replica of Unlatch on each node of a Slurm job, and keep a file of their addresses for a gateway:
#
#   sbatch --nodes 3 --cpus-per-task 16 --mem 32G --no-kill slurm.sh replicas.txt --kernels /data/kernels.py --insecure
#   unlatch gateway --replicas file:replicas.txt
#
# The gateway runs where the job's script does, on the job's first node: start it here in the background, or keep the
# file where the gateway can read it. All flags after the file go to `unlatch compute`. A node needs `unlatch` on its
# PATH. A replica has the cores and the memory that Slurm grants. The job's end ends them all (scancel, time limit).
set -euo pipefail

file=${1:?"wanted: slurm.sh FILE [flags of unlatch compute]"}
shift

# On each node: run the replica, again if it ends. Print "NODE ADDRESS" when it serves, and "NODE" when it has ended.
replica() {
    local cores=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} host flags
    host=$(scontrol show node "$SLURMD_NODENAME" | grep --only-matching --perl-regexp 'NodeAddr=\K\S+')
    flags=(--listen "$host:0" --metrics-listen 127.0.0.1:0 --health-listen 127.0.0.1:0)
    # Some clusters count memory but do not limit it, so the replica is told. A quarter is for replies and the service.
    flags+=(--workers "$cores" --blas-threads 1 --name "$SLURMD_NODENAME")
    if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then
        local bytes=$((SLURM_MEM_PER_NODE * 1024 * 1024))
        flags+=(--worker-memory-bytes $((bytes / 2 / cores)) --input-arena-bytes $((bytes / 4)))
    fi
    trap exit TERM
    while true; do
        # The log goes to the job's output, and the address that it names to the script.
        unlatch compute "${flags[@]}" "$@" 2> >(tee /dev/stderr | sed --unbuffered --quiet \
            "/\"event\": \"serving\"/ s/.*\"listen\": \"\([^\"]*\)\".*/$SLURMD_NODENAME \1/p") || true
        echo "$SLURMD_NODENAME"
        sleep 1
    done
}

declare -A addresses
write() {
    printf '%s\n' "${addresses[@]}" > "$file.new"
    mv "$file.new" "$file"
}

# Nodes get the function itself, because Slurm copies the script to the first node only. A task or a node that fails
# does not end the others.
while read -r node address; do
    unset "addresses[$node]"
    [ -z "$address" ] || addresses[$node]=$address
    write
done < <(srun --ntasks-per-node 1 --unbuffered --no-kill --wait 0 --kill-on-bad-exit=0 \
    bash -c "$(declare -f replica); replica \"\$@\"" replica "$@")
