#!/bin/sh
# Puts the dagster.yaml of the chosen executor into DAGSTER_HOME, unless one is mounted there, and becomes the command.
set -eu
project=$(cd "$(dirname "$0")/.." && pwd)
executor=${MEDIA_COMPUTE__EXECUTOR:-local}
if [ "$executor" = local ]; then
    file=$project/dagster.yaml
else
    file=$project/deploy/$executor/dagster.yaml
fi
if [ ! -e "$DAGSTER_HOME/dagster.yaml" ]; then
    cp "$file" "$DAGSTER_HOME/dagster.yaml"
fi
exec "$@"
