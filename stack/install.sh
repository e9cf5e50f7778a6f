# Install the Debian packages that are named, as root. See stack/system.py.
#
# A machine that runs tests must not get two more servers on their default ports, now or before the tests are done.
# policy-rc.d is how Debian lets an administrator say so. All is done in one go: whatever happens to apt or to us, the
# file goes again; after kill -9 it stays, and allows everything. One of somebody else's is left alone.
set -eu
policy=/usr/sbin/policy-rc.d
exec 9< /usr/sbin
flock 9
if [ ! -e $policy ] || grep -q 'tests of bus_alt_connection' $policy; then
    trap 'rm -f $policy' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\n# No new services while the tests of bus_alt_connection install packages.\n' > $policy
    printf 'if kill -0 %s 2> /dev/null; then exit 101; fi\n' $$ >> $policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}
# The lists may be missing or out of date, and getting them takes time: only if it does not go without.
install "$@" || { apt-get update -q && install "$@"; }
