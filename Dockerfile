# Not built yet: the authors' machine has no docker engine. Read it as a first version, and report what fails.
#
#   docker build -t megatron_lite .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/runs" megatron_lite \
#       --standalone --nproc-per-node gpu pretrain_gpt.py --config configs/tiny.json \
#       --set data.train=/runs/corpus_text_document --set train.output_dir=/runs/tiny
#
# The devel image, because nvcc compiles the kernels here, and DeepSpeed some of its operations (offload) at first use.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# A fixed number, so that a cluster can state it (runAsUser, fsGroup) and volumes keep their owner.
RUN useradd --uid 10001 --create-home trainer \
    && install -d -o trainer -g trainer /opt/megatron_lite /opt/venv /runs
USER trainer
WORKDIR /opt/megatron_lite
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# The gigabytes first: this layer changes only when the versions do.
COPY --chown=trainer constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch deepspeed

# Editable, because a script of this folder finds the package beside it and needs the compiled modules there.
COPY --chown=trainer . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[hf,tracking]'

VOLUME /runs
ENTRYPOINT ["torchrun"]
CMD ["--standalone", "--nproc-per-node", "1", "pretrain_gpt.py", "--help"]
