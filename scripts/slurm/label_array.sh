#!/bin/bash
# Label many photographs with a trained model, a folder for each task of the array:
#
#     ls -d photos/*/ > folders.txt
#     sbatch --array=1-$(wc -l < folders.txt)%16 scripts/slurm/label_array.sh folders.txt run/segmenter masks
#
# Tasks need nothing of each other; the list, the model and the photographs must be seen from every node. Task k writes
# masks/<k>, and keeps what is there: a task that was preempted goes on with the photographs that are left.
#SBATCH --job-name=wsss-label
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

list=$1 model=$2 out=$3
folder=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$list")
if [ -z "$folder" ]; then
    echo "$list: expected a line $SLURM_ARRAY_TASK_ID, got $(wc -l < "$list") lines" >&2
    exit 1
fi
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
exec srun wsss predict "$folder" --model "$model" --out "$out/$SLURM_ARRAY_TASK_ID"
