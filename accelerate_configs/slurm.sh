#!/usr/bin/env bash
# One job of a pair on several machines of a Slurm cluster. Submit both from the repository's root,
# in either order; --runs_dir must be a directory that all machines share:
#
#   sbatch accelerate_configs/slurm.sh recipes/receiver.py --runs_dir /shared/runs --run first
#   sbatch accelerate_configs/slurm.sh recipes/donor.py --runs_dir /shared/runs --run first
#
# Slurm may start the second one much later, and the first one trains alone after --peer_wait
# seconds: raise them on both beyond that time; with --require_peer it ends with an error instead.
#
# With --checkpointing_steps on both, a job that ends too early can go on. A minute before the end of
# its time, and by scancel, it gets SIGTERM: it saves a checkpoint, tells the other and ends, for
# Slurm as FAILED with status 1, or CANCELLED. When the receiver ends, its donor ends too, and says so.
# Then submit both lines again with --resume_from_checkpoint latest. When the donor's time ends first,
# the receiver goes on alone, and what it saves has those steps in it; with --require_peer it ends too,
# and both go on from their last checkpoints as one job would.
#
# It has run under Slurm 22.05, with one machine as four nodes of one rank each, and no GPU.

#SBATCH --job-name=gradient-bridge
#SBATCH --nodes=2                # machines of this job
#SBATCH --ntasks-per-node=1      # one launcher on each machine; it starts the ranks
#SBATCH --gpus-per-node=8        # ranks on each machine
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60         # s before the end; the launcher gives the ranks 30 s to save
#SBATCH --no-requeue             # a restart by Slurm would begin again, with no checkpoint
#SBATCH --output=%x-%j.log

set -euo pipefail

# Machine 0 is where the ranks meet. Two jobs that share it need two ports.
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_port=$((10000 + SLURM_JOB_ID % 20000))
ranks_per_node=${SLURM_GPUS_ON_NODE:-1}

# A machine that has ended lets the others save for a minute; with --kill-on-bad-exit they would get
# a second SIGTERM at once, which breaks that off. From 22.05 on srun takes --cpus-per-task from its
# own line only, and may bind a launcher and all its ranks to one core without.
# What stands in single quotes is read on each machine, which knows its own number only there.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$2" --main_process_port "$3" "${@:4}"
' launcher $((SLURM_NNODES * ranks_per_node)) "${machines[0]}" "$main_port" "$@"
