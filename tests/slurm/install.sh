#!/usr/bin/env bash
# Debian's Slurm for the tests, where that can be done: tests/slurm says why it is skipped elsewhere.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
if type slurmctld slurmd sbatch munged > /dev/null 2>&1; then exit; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then exit; fi

echo "Installing Debian's slurm-wlm and munge for tests/slurm, once."
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d  # which daemons may start at their installation: none
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
wait_for_others="-oDPkg::Lock::Timeout=300"
install() { apt-get "$wait_for_others" install -qq -y --no-install-recommends slurm-wlm munge > /dev/null; }
install || { apt-get "$wait_for_others" update -qq && install; } || echo "apt-get could not; tests/slurm will be skipped."
