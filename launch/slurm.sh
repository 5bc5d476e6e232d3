#!/usr/bin/env bash
# One process a node, all of its devices; submit from the checkout, with logs below the current folder:
#   sbatch --nodes=4 launch/slurm.sh --config=imagenet_carp --config.data.root=DIR --workdir=DIR
# Stopped at the time limit it saves and leaves; the same command resumes, on any number of nodes.
#SBATCH --job-name=protojax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=protojax-%j.log
set -euo pipefail
# sbatch runs a copy of this file: the checkout is where it was submitted from.
exec srun --kill-on-bad-exit=0 "${SLURM_SUBMIT_DIR:?submit with sbatch}/launch/local.sh" "$@"
