#!/usr/bin/env bash
# What one types on the login node of a SLURM cluster. Each command stands alone: copy the one you need.
# The first submits a small sweep and waits for it; the others are comments.
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE

# A sweep as an array job: one job per run, each requeued by itself when its time is up or it is preempted. Ctrl-C stops
# the waiting and leaves the jobs alone; the same command again does what is missing.
python -m rlhf_exp -m hydra/launcher=slurm \
    hydra.launcher.partition="${PARTITION:-gpu}" hydra.launcher.timeout_min=240 hydra.launcher.cpus_per_task=4 \
    hardware=gpu reward=pairwise,ensemble seed='range(5)' "$@"

# How it is, without starting anything: the same command with sweep=status; all runs there are:
#   python -m rlhf_exp sweep=status

# Do not wait; run the code as it is now, whatever is edited later:
#   python -m rlhf_exp -m hydra/launcher=slurm hydra.launcher.wait=false hydra.launcher.snapshot=true seed='range(5)'

# A large model: two nodes of eight A100 each, one task per GPU.
#   python -m rlhf_exp -m hydra/launcher=slurm hardware=multinode algo=ppo policy=pythia_1.4b \
#       hydra.launcher.account=<account> hydra.launcher.constraint=a100 hydra.launcher.timeout_min=1440 \
#       'hydra.launcher.set_up=["module load cuda", "export NCCL_DEBUG=WARN"]'

# One task per node, which starts the processes of its GPUs itself:
#   python -m rlhf_exp -m hydra/launcher=slurm hardware=multinode hydra.launcher.tasks=node hydra.launcher.cpus_per_task=64

# A search, eight trials at a time, that goes on where it was interrupted:
#   python -m rlhf_exp -m experiment=ppo_search hydra/launcher=slurm \
#       hydra.sweeper.n_jobs=8 hydra.sweeper.storage=sqlite:///search.db

# By hand, in an allocation of two nodes (salloc -N2 --gpus-per-node=8); it stops before the end, and resume= goes on:
#   srun --ntasks-per-node=8 --kill-on-bad-exit=1 python -m rlhf_exp hardware=multinode hydra.run.dir=multirun/by-hand
