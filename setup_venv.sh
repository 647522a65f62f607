# Sourced by demo.sh and test.sh: an own virtual environment in .venv with the given requirement files, made once.
# Usage: . ./setup_venv.sh requirements.txt [more.txt ...]; afterwards $python runs inside it.
find_python() {
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python found, expected python3 of version 3.11 or later on PATH" >&2
    exit 2
}

if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    "$(find_python)" -m venv .venv
fi
python="$PWD/.venv/bin/python"
for requirements in "$@"; do
    stamp=".venv/installed-$(basename "$requirements")"
    if ! cmp -s "$requirements" "$stamp"; then
        echo "installing $requirements"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cp "$requirements" "$stamp"
    fi
done
