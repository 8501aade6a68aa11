#!/bin/sh
# Asks the host to plug or unplug: one line there, one line back.
exec 3<>/dev/ttyS2
echo "$*" >&3
IFS= read -r answer <&3
echo "$answer"
[ "$answer" = ok ]
