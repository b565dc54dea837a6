"""A process with its own Hub settings, which runs what a test asks for; one for many tests, as its start takes long.

A request is a line of JSON on stdin: `arguments` of the command line, or `code` whose variable `answer` is told.
"""

import json
import os
import sys
import tempfile
import traceback


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    from distill.cli import main as distill

    names: dict = {}
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(request["environment"])
        answer, status = None, 0
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                if "arguments" in request:
                    status = distill(request["arguments"])
                else:
                    exec(request["code"], names)
                    answer = names.pop("answer", None)
            except (Exception, SystemExit):
                status = -1
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            out.seek(0)
            err.seek(0)
            reply = {"status": status, "answer": answer, "out": out.read(), "err": err.read()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
