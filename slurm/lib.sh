# What the job scripts of this folder share: environment, container, nodes, a start of trainers and engines, and what
# follows when it ends. Sourced by them, not run. Variables for users, besides those of the scripts:
#   RA3_ENV         file to source first (modules, virtual environment)
#   RA3_PYTHON      interpreter (default: without RA3_ENV and RA3_CONTAINER .venv/bin/python if there is one, else python)
#   RA3_CONTAINER   image.sif: Apptainer with --nv; another single word: an image for Pyxis/Enroot, with the current
#                   folder mounted; words that begin with --: srun's options of Pyxis, as they are
#                   ("--container-image=IMAGE --container-mounts=A:B"); other words: put before the interpreter
#   RA3_LOG_DIR     where the job's log folder goes (default runs/slurm), on a file system that all nodes share
#   RA3_MAX_STARTS  starts in a row that may save no new checkpoint before the job gives up (default 3)
# Log folder: $RA3_LOG_DIR/<job name>-<job id>, one for an array job and one for a chain (RA3_CHAIN, see `ra3 submit`),
# one file per process, which goes on after a requeue. start-<n>/ in it is where the tasks of a start find each other.
set -euo pipefail
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

fail() {
    echo "$SLURM_JOB_NAME: $*" >&2
    exit 2
}

# Everything that is said from here on goes to NAME.log of the job's log folder.
open_logs() {
    local name=$1
    logs=${RA3_LOG_DIR:-runs/slurm}/$SLURM_JOB_NAME-${RA3_CHAIN:-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    mkdir -p "$logs"
    logs=$(cd "$logs" && pwd)
    echo "logs: $logs"
    exec >>"$logs/$name.log" 2>&1
}

# Sets python: the words that run an interpreter, and srun_container: options of srun.
use_environment() {
    local words
    if [[ -n ${RA3_ENV:-} ]]; then
        # shellcheck source=/dev/null
        source "$RA3_ENV"
    elif [[ -z ${RA3_CONTAINER:-} && -x .venv/bin/python ]]; then
        RA3_PYTHON=${RA3_PYTHON:-$PWD/.venv/bin/python}
    fi
    RA3_PYTHON=${RA3_PYTHON:-python}
    python=("$RA3_PYTHON") srun_container=()
    read -ra words <<<"${RA3_CONTAINER:-}"
    case ${#words[@]}:${words[0]:-} in
        0:) ;;
        *:--*) srun_container=("${words[@]}") ;;
        1:*.sif) python=(apptainer exec --nv --bind "$PWD" "${words[0]}" "$RA3_PYTHON") ;;
        1:*) srun_container=("--container-image=${words[0]}" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD") ;;
        *) python=("${words[@]}" "$RA3_PYTHON") ;;
    esac
}

list() { local IFS=,; echo "$*"; }

# Sets what a start needs to know of the allocation. The addresses are SLURM's own: node names need not resolve.
lay_out() {
    local nodes nodelist=$SLURM_JOB_NODELIST asked
    # What was asked for may begin with a type of GPU. It comes first: an exclusive node shows all that it has.
    asked=${SLURM_GPUS_PER_NODE_HET_GROUP_0:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}}
    gpus_per_node=${RA3_GPUS_PER_NODE:-${asked##*:}}
    asked=${SLURM_GPUS_PER_NODE_HET_GROUP_1:-$gpus_per_node}
    engine_gpus=${RA3_ENGINE_GPUS_PER_NODE:-${asked##*:}}
    case ${SLURM_HET_SIZE:-1} in
        1)
            engine_nodes=${RA3_ENGINE_NODES:-1}
            mapfile -t nodes < <(scontrol show hostnames "$nodelist")
            trainer_nodes=$((${#nodes[@]} - engine_nodes))
            ((trainer_nodes >= 1)) || fail "RA3_ENGINE_NODES=$engine_nodes leaves no trainer node of ${#nodes[@]};" \
                "raise --nodes or lower RA3_ENGINE_NODES"
            trainer_place=(--nodelist="$(list "${nodes[@]:0:trainer_nodes}")")
            engine_place=(--nodelist="$(list "${nodes[@]:trainer_nodes}")")
            ;;
        2)
            trainer_nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_0 engine_nodes=$SLURM_JOB_NUM_NODES_HET_GROUP_1
            nodelist=$SLURM_JOB_NODELIST_HET_GROUP_0,$SLURM_JOB_NODELIST_HET_GROUP_1
            trainer_place=(--het-group=0) engine_place=(--het-group=1)
            ;;
        *) fail "$SLURM_HET_SIZE components: 0 are trainers, 1 are engines, there is no other" ;;
    esac
    ranks_per_node=$((gpus_per_node > 0 ? gpus_per_node : ${RA3_TASKS_PER_NODE:-1}))
    engines_per_node=${RA3_ENGINES_PER_NODE:-$((engine_gpus > 0 ? engine_gpus : 1))}
    ((engine_gpus % engines_per_node == 0)) ||
        fail "RA3_ENGINES_PER_NODE=$engines_per_node does not divide the $engine_gpus GPUs of an engine node"
    export RA3_GPUS_PER_ENGINE=$((engine_gpus / engines_per_node)) RA3_ENGINES=$((engine_nodes * engines_per_node))
    RA3_ADDRESSES=$(scontrol show node --oneliner "$nodelist" | sed -nE 's/^NodeName=(\S+) .* NodeAddr=(\S+) .*/\1=\2/p')
    export RA3_ADDRESSES
}

# SLURM before 23.02 does not tell a job when it ends; the trainers save before (megatron_ra3/deadline.py).
know_the_end() {
    local end
    end=$(SLURM_TIME_FORMAT=standard scontrol show job "$job" --oneliner | grep -oPm1 ' EndTime=\K[0-9T:-]+') || return 0
    SLURM_JOB_END_TIME=$(date -d "$end" +%s)
    export SLURM_JOB_END_TIME
}

# on COUNT PER_NODE LOG OPTION... -- COMMAND...: PER_NODE tasks on each of COUNT nodes, a log file each. To be called in
# the background: `exec` makes that process srun itself, so that signals reach it.
on() {
    local count=$1 per_node=$2 log=$3 options=()
    shift 3
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    exec srun --nodes="$count" --ntasks=$((count * per_node)) --ntasks-per-node="$per_node" --distribution=block \
        --cpu-bind=none --open-mode=append --output="$logs/$log" "${srun_container[@]}" "${options[@]}" "${@:2}"
}

# start COMMAND CONFIG [key=value...]: trainers, and engines if there are any; sets status when the trainers have ended.
start() {
    local command=$1 task=("${python[@]}" -m megatron_ra3.launch.task)
    shift
    export RA3_START=$logs/start-$(($(starts) + 1))
    mkdir "$RA3_START"
    if ((RA3_ENGINES > 0)); then
        on "$engine_nodes" "$engines_per_node" engine-%t.log "${engine_place[@]}" -- \
            "${task[@]}" engine "$RA3_PYTHON" serve "$@" &
        engine_step=$!
    fi
    on "$trainer_nodes" "$ranks_per_node" trainer-%t.log "${trainer_place[@]}" --kill-on-bad-exit=1 -- \
        "${task[@]}" trainer "$RA3_PYTHON" "$command" "$@" &
    trainer_step=$!
    while :; do
        interrupted=
        status=0
        wait "$trainer_step" || status=$?
        [[ -n $interrupted ]] || break
    done
    trainer_step=
    stop_engines
    status=$(telling "$status")
}

stop_engines() {
    [[ -n ${engine_step:-} ]] || return 0
    # srun ends its tasks when it is terminated.
    kill -TERM "$engine_step" 2>/dev/null || true
    wait "$engine_step" || true
    engine_step=
}

starts() { find "$logs" -maxdepth 1 -name 'start-*' | wc -l; }

# telling STATUS: of the exit codes that ranks have left, the one that says most: 2, 75, 76, else the highest but that of
# ranks that srun ended (143). srun's own is the highest of all.
telling() {
    local code left
    left=$(cat "$RA3_START"/exit-* 2>/dev/null | sort -nu) || true
    for code in 2 75 76 $(grep -vx 143 <<<"$left" | sort -nr); do
        if (($1 && code)) && grep -qx "$code" <<<"$left"; then
            echo "$code"
            return
        fi
    done
    echo "$1"
}

# How many starts in a row, up to the last one, have saved nothing new. A start's file `saved` holds the newest
# checkpoint's step when it began and, unless it was cut off, when it ended.
fruitless() {
    local number count=0 newest='' saved
    for ((number = $(starts); number > 0; number--)); do
        if [[ -e $logs/start-$number/saved ]]; then
            mapfile -t saved <"$logs/start-$number/saved"
            newest=${newest:-${saved[-1]}}
            [[ ${saved[0]} == "$newest" ]] || break
        fi
        count=$((count + 1))
    done
    echo "$count"
}

# verdict STATUS FRUITLESS NEAR_LIMIT: what follows the end of a start.
#   finish   the run is complete          again    start on the same nodes
#   requeue  go back into the queue       give_up  nothing that a further start could mend
verdict() {
    local status=$1 fruitless=$2 near_limit=$3 most=${RA3_MAX_STARTS:-3}
    if ((status == 0)); then
        echo finish
    elif ((fruitless >= most || (status == 2 && fruitless > 1))); then
        echo give_up
    elif [[ -n $near_limit ]] || ((status == 75 || fruitless == most - 1)); then
        echo requeue
    else
        echo again
    fi
}

give_up() {
    echo "giving up: $1 starts in a row have saved no new checkpoint; see the logs in $logs"
    exit "$status"
}

# run_to_the_end COMMAND CONFIG [key=value...]: a whole job of trainers and engines; does not return.
run_to_the_end() {
    local idle follows
    (($# >= 2)) || fail "usage: sbatch SCRIPT CONFIG.yaml [key=value ...]"
    [[ -r $2 ]] || fail "cannot read the configuration $2 (from $PWD)"
    open_logs batch
    echo "job $job, start $(($(starts) + 1)), on $SLURM_JOB_NODELIST"
    if [[ -e $logs/finished ]]; then
        echo "an earlier job of this chain has finished the run"
        exit 0
    fi
    status=1
    idle=$(fruitless)
    ((idle < ${RA3_MAX_STARTS:-3})) || give_up "$idle"
    use_environment
    lay_out
    know_the_end
    near_limit=
    trap 'stop_engines' EXIT
    # The time limit is near: tell the trainers. A trapped signal interrupts `wait`, which is then repeated.
    trap 'near_limit=1 interrupted=1; kill -USR1 ${trainer_step:-} 2>/dev/null || true' USR1
    while :; do
        start "$@"
        idle=$(fruitless)
        follows=$(verdict "$status" "$idle" "$near_limit")
        echo "start $(starts) ended with exit code $status; $idle starts in a row have saved no new checkpoint: $follows"
        case $follows in
            finish) touch "$logs/finished" && exit 0 ;;
            give_up) give_up "$idle" ;;
            requeue)
                scontrol requeue "$job" || echo "cannot be requeued: the next job of the chain, or the same command, goes on"
                exit "$status"
                ;;
        esac
    done
}
