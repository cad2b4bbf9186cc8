#!/bin/bash
# A whole run on two nodes of four GPUs, one process for each:  sbatch scripts/slurm/train.sh --data photos --out run
#
# All nodes must see the same --out and the same data: one process writes what the others read.
# A batch of the recipe is shared out over all 8 processes, and must have 8 images at least.
# Two minutes before the time is over, or when the job is preempted, SLURM sends SIGUSR1 or SIGTERM: a training then
# writes a checkpoint and ends with status 75, other stages keep their finished shards and end with 138 or 143. The job
# queues up again, and goes on from there.
#SBATCH --job-name=wsss-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
# As `accelerate launch --mixed_precision bf16` would set it.
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16}

# Started by srun itself, each process gets the signals, and their highest status is srun's: torchrun and accelerate
# launch would hide it, and end at SIGUSR1 before the checkpoint. When one process fails, the others end with it.
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec wsss run "$@"' wsss "$@"
status=$?
case $status in
75 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
