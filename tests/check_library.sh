#!/bin/sh
# check_library.sh LIBRARY - the shared library keeps no state of its own and leaves the process
# alone: no variable that can be written, no call that ends the process or writes to its streams.
set -u
library=$1
bad=0

# what the compiler's start-up files bring along
crt='^(completed\.[0-9]*|__dso_handle|__TMC_END__|_edata|_end|__bss_start|\.data|\.bss|\.tbss)$'
written=$(objdump -t "$library" | awk '$0 ~ /[ \t]\.(data|bss|tdata|tbss)[ \t]/ { print $NF }' |
          grep -Ev "$crt" | sort)
[ -z "$written" ] || { echo "variables that can be written:"; echo "$written"; bad=1; }

calls=$(nm -D --undefined-only "$library" | awk '{ sub(/@.*/, "", $NF); print $NF }' |
        grep -Ex -e 'v?printf|__v?printf_chk|puts|putchar|perror|stdout|stderr|__assert_fail' \
                 -e 'exit|_exit|quick_exit|atexit|abort|signal|sigaction|system')
[ -z "$calls" ] || { echo "calls that a library must not make:"; echo "$calls"; bad=1; }

[ $bad = 0 ] && echo "ok: $(basename "$library") keeps no state and leaves the process alone"
exit $bad
