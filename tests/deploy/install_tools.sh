#!/bin/sh
# nginx and promtool (of Prometheus) for tests/deploy, where they are missing; as root on Debian or Ubuntu.
# Programs only: Debian's packages start a service once they are installed and at every boot, on ports that may be taken.
set -eu
PATH=$PATH:/usr/sbin:/usr/local/sbin
packages="" units=""
command -v nginx > /dev/null || { packages=nginx-light units=nginx; }
command -v promtool > /dev/null || { packages="$packages prometheus" units="$units prometheus"; }
[ -n "$packages" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "Install nginx and promtool (of Prometheus), or run this as root on Debian or Ubuntu" >&2
  exit 1
fi
policy=${POLICY:-/usr/sbin/policy-rc.d}
if [ ! -e "$policy" ]; then # installers ask it before they start anything; 101 = no
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
fi
apt-get update -q
# shellcheck disable=SC2086
apt-get install -q -y --no-install-recommends $packages
if command -v systemctl > /dev/null; then
  # shellcheck disable=SC2086
  systemctl disable --quiet $units || true # without a running systemd there is nothing to disable
fi
echo "Installed, not started and not enabled:$packages" | sed 's/:\([^ ]\)/: \1/'
