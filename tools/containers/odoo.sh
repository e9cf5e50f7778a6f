#!/bin/bash
# Start Odoo as the public image odoo:19.0 does. HOST, PORT, USER, PASSWORD and PASSWORD_FILE become options of Odoo,
# unless odoo.conf has the option, or the environment libpq's variable, which Odoo 19.0 reads by itself. Odoo starts
# when it can log in to the database postgres; the container ends if that takes 30 s.
set -e
if [ -v PASSWORD_FILE ]; then
    PASSWORD=$(< "$PASSWORD_FILE")
fi
options=()
libpq=()
add() {
    if [ ! -v "$2" ] && ! grep -Eq "^\s*$1\s*=" "$ODOO_RC"; then
        options+=("--$1" "$3")
        libpq+=("$2=$3")
    fi
}
add db_host PGHOST "${HOST:-db}"
add db_port PGPORT "${PORT:-5432}"
add db_user PGUSER "${USER:-odoo}"
add db_password PGPASSWORD "${PASSWORD:-odoo}"
case $1 in
odoo | --) shift ;;
-*) ;;
*) exec "$@" ;;
esac
end=$((SECONDS + 30))
until (export "${libpq[@]}" PGCONNECT_TIMEOUT=2 && psql -d postgres -c 'SELECT 1' > /dev/null); do
    [ $SECONDS -lt $end ] || exit 1
    sleep 1
done
exec odoo "$@" "${options[@]}"
