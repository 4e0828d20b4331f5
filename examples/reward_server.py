"A reward server in thirty lines: `python reward_server.py 8000`, then reward='http://localhost:8000'."
import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(png: bytes, prompt: str) -> float:
    "Score one picture. Put your model here, or ask a vision-language model; this one likes small files."
    return -len(png)/1000


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        pictures = [base64.b64decode(image) for image in body['images']]
        rewards = [score(png, prompt) for png, prompt in zip(pictures, body['prompts'])]
        answer = json.dumps(dict(rewards=rewards)).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args): pass


if __name__ == '__main__':
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    ThreadingHTTPServer(('localhost', port), Handler).serve_forever()
