#!/usr/bin/env bash
# What one types on a laptop or a workstation. Each line stands alone: copy the one you need.
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE  # waiting threads sleep; on shared cores worth a factor of five to ten

# The main job: supervised policy, noisy preferences, five reward models, PPO, evaluation. Offline.
python -m rlhf_exp algo=ppo reward=ensemble

# One reward model and no KL penalty: the proxy climbs while gold falls.
python -m rlhf_exp reward=pairwise algo.kl_coef=0

# Five seeds of both, two jobs at a time, each in its own process; what they share is trained once. The same command again
# does what is missing, and tells how everything is with sweep=status.
python -m rlhf_exp -m reward=pairwise,ensemble seed='range(5)' hydra.launcher.jobs=2

# PPO's settings, searched; goes on where it was interrupted.
#   python -m rlhf_exp experiment=ppo_search hydra.sweeper.storage=sqlite:///search.db

# Your own prompts on a real model; gold is a sentiment lexicon.
#   python -m rlhf_exp policy=smollm2_135m data=local data.prompts=prompts.jsonl

# Several processes on this machine, started here: DeepSpeed ZeRO on two GPUs (or two CPU processes, where there is none).
#   python -m rlhf_exp hardware=zero2 hardware.processes=2

# Continue what was interrupted.
#   python -m rlhf_exp resume=multirun/<date>/<time>/0
