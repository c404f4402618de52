#!/usr/bin/env bash
# The whole workflow for one model, in the current folder:
#
#     bash pipeline.sh qwen
#     NUM_BLOCKS=7 SEARCH=race bash pipeline.sh meta-llama/Llama-3.1-8B-Instruct
#     LAUNCH="accelerate launch --multi_gpu" bash pipeline.sh llama      # all GPUs of this machine
#
# Every step writes its result under a temporary name first and takes up interrupted work, so after
# an interruption the same command goes on. Set the variables below to change what is done.
set -euo pipefail

model=${1:?give a model: qwen, llama, granite, smollm, a Hugging Face id, a local folder or a GGUF file}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=$(basename -- "$model") # what file names begin with
if [ -d "$model" ]; then
    name=$(basename -- "$(cd -- "$model" && pwd -L)") # of a link, its own name
elif [[ $name == *.[Gg][Gg][Uu][Ff] ]]; then
    name=${name%.*}
fi

launch=${LAUNCH:-python}              # or "accelerate launch --multi_gpu"
num_samples=${NUM_SAMPLES:-}          # prompts to answer; empty: all
max_tokens=${MAX_TOKENS:-4096}        # of an answer
max_samples=${MAX_SAMPLES:-}          # answers that the search uses; empty: all
batch_size=${BATCH_SIZE:-32}
search=${SEARCH:-race}                # or full, the paper's schedule
num_blocks=${NUM_BLOCKS:-4}
num_epochs=${NUM_EPOCHS:-10}
granularities=${GRANULARITIES:-layer} # of the scales: layer, channel, or "layer channel" for both
loss=${LOSS:-ce}                      # what the scales are trained on: ce or kl
rank=${REPLACEMENT_RANK:-0}           # of the maps in the skipped blocks' place; 0: none
export_formats=${EXPORT:-}            # for example "folded nemotron_nas"

say() { printf '\n== %s\n' "$*" >&2; }

say "1. $name answers the prompts"
python "$here/generate_model_gt_data.py" --model="$model" --max_tokens "$max_tokens" \
    ${num_samples:+--num_samples "$num_samples"}

say "2. answers become token ids and labels"
python "$here/process_gt_data.py" --model="$model"

say "3. search for $num_blocks attention blocks to skip"
$launch "$here/block_selection.py" --model="$model" --data_path "data/$name-processed-data/data.jsonl" \
    --search "$search" --num_blocks "$num_blocks" --batch_size "$batch_size" --replacement_rank "$rank" \
    ${max_samples:+--max_samples "$max_samples"}

scaled=() # folders of checkpoints
for granularity in $granularities; do
    say "4a. train the scales, by $granularity"
    folder=scaled_${name}_ckpts
    if [ "$granularity" != layer ]; then folder=scaled_${name}_${granularity}_ckpts; fi
    scaled+=("$folder")
    $launch "$here/param_scale.py" --model="$model" --data_path "data/$name-processed-data/data.jsonl" \
        --blocks_to_skip "./${name}_block_selection.json" --granularity "$granularity" --loss "$loss" \
        --replacement_rank "$rank" \
        --num_epochs "$num_epochs" --batch_size "$batch_size" --validation_split 0.2 \
        --output_dir "$folder" --resume ${export_formats:+--export $export_formats}
done

say "4b. the same skips without training"
python "$here/unscaled_ckpt.py" --model="$model" --blocks_to_skip "./${name}_block_selection.json" \
    --replacement_rank "$rank" --data_path "data/$name-processed-data/data.jsonl"

say "what came of it"
PYTHONPATH="$here" python -m hopscotch_common.report "./${name}_math_final_report.json" \
    "data/$name-processed-data" "./${name}_block_selection.json" "${scaled[@]}"

say "to publish a folder, with the model card in it"
for folder in "${scaled[@]}"; do
    epoch=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_epoch"])' "./$folder/report.json")
    for kind in "epoch_$epoch" $export_formats; do
        printf 'hf upload OWNER/%q %q . --exclude training_state.safetensors\n' \
            "$name-hopscotch" "./$folder/${name}_scaled_$kind"
    done
done
