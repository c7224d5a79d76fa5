#!/usr/bin/env bash
# Install gpt2_jax on one TPU worker, mount the bucket, copy the shards.
#
#     setup.sh TARBALL BUCKET DATA     BUCKET and DATA may be empty
#
# tpu.py runs it on every worker at once. A second time it does only what is missing.
set -euo pipefail
tarball=$1 bucket=$2 data=$3
root=$HOME/gpt2-jax
apt=(sudo DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600)

# Python 3.12 in a venv by uv: Ubuntu 22.04 comes with 3.10, gpt2_jax needs 3.11.
install_package() {
  local digest
  digest=$(sha256sum <"$tarball")
  if [ "$(cat installed 2>/dev/null)" = "$digest" ]; then
    return
  fi
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null; then
    curl -LsSf --retry 5 https://astral.sh/uv/install.sh | sh
  fi
  uv venv --clear --python 3.12 venv
  uv pip install --python venv/bin/python "./source[tpu,offline]"
  printf '%s\n' "$digest" >installed
}

# gcsfuse from Google's own apt repository, as docs/tpu.md says.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc release
  if command -v gcsfuse >/dev/null; then
    return
  fi
  release=$(lsb_release -c -s)
  curl -LsSf --retry 5 https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  "${apt[@]}" update
  "${apt[@]}" install gcsfuse
}

# No metadata is cached: all workers write into one run directory and must see what the
# others wrote. The rename limit lets a checkpoint appear by renaming its directory in
# buckets without hierarchical namespace.
mount_bucket() {
  local where=/mnt/gcs/$bucket
  if mountpoint -q "$where"; then
    return
  fi
  sudo mkdir -p "$where"
  sudo chown "$(id -un)" "$where"
  gcsfuse --implicit-dirs --rename-dir-limit=200000 \
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" "$where"
}

copy_shards() {
  local to
  to=data/$(basename "$data")
  mkdir -p "$to"
  gcloud storage rsync --recursive "$data" "$to"
}

cd "$root"
rm -f ready
install_package
if [ -n "$bucket" ]; then
  install_gcsfuse
  mount_bucket
fi
if [ -n "$data" ]; then
  copy_shards
fi
touch ready
