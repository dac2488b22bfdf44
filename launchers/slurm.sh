#!/usr/bin/env bash
# One run on two nodes of eight GPUs under SLURM: sbatch launchers/slurm.sh [overrides]
# srun starts a process per GPU; they find each other by what SLURM tells them and share one run directory.
#SBATCH --job-name=rlhf_exp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300        # five minutes before the end: finish the step, save, stop
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

# --kill-on-bad-exit ends all when one process fails. The directory is named by the job, for resume=multirun/job-<id>.
srun --kill-on-bad-exit=1 python -m rlhf_exp hardware=multinode \
    hydra.run.dir="multirun/job-$SLURM_JOB_ID" "$@"

# The same without SLURM, typed on each of the two nodes:
#   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=<first node>:29500 --rdzv_id=<any name> \
#       -m rlhf_exp hardware=multinode
