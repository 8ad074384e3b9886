# What is this machine, and which Pythons are here?  Arguments: more folders to look in.
echo "system $(uname -s)"
echo "machine $(uname -m)"
code='import sys
try:
    import platform, venv
    has_venv = 1
except ImportError:
    has_venv = 0
wide = getattr(sys, "maxsize", 0) > 2**32
print("%d %d %d %d %d %s" % (sys.version_info[0], sys.version_info[1], sys.version_info[2], has_venv, wide,
    getattr(getattr(sys, "implementation", None), "name", "cpython") + getattr(sys, "abiflags", "")))
'
seen=:
try() {
  case "$seen" in *":$1:"*) return ;; esac
  seen="$seen$1:"
  [ -x "$1" ] || return
  # In quotes, and the answer's first line alone: what stands there may be anything.
  answer=$("$1" -I -c "$code" </dev/null 2>/dev/null) || answer=$("$1" -c "$code" </dev/null 2>/dev/null) || return
  echo "python $(echo "$answer" | head -n 1) $1"
}
for name in python3 python3.14 python3.13 python3.12 python3.11; do
  found=$(command -v "$name" 2>/dev/null) && case "$found" in /*) try "$found" ;; esac
  for folder in "$@"; do
    case "$folder" in
      "~/"*) for each in "$HOME"/${folder#??}; do try "$each/$name"; done ;;
      *) try "$folder/$name" ;;
    esac
  done
done
exit 0
