"""A SOURCE/SPLIT folder as the first format's writer left it: packed rows of 8, `[1 2 3] [4 5]`, `[6 x 8]`, `[7 8]`."""

import base64
import zlib
from pathlib import Path

FILES = {
    "00000.tar": (
        "eNrtl99qgzAUxnVdxy73CMXrtSTOythtH0SymE5XTYqJ+8ued6+xEytstLBdrAjF7weHE7/oiWA+j8pCuLlrRKnnzLNwZqO0DY6Jr5sm"
        "SZeJ/cz4j3Gnc54uWTBjwQC01omGlg/GSUhxRjGhOKeYUnxOvuMi+D3AaSP3/W/Wa6ucHdL/bLnv/5jFMfw/JJM+T/t82ecrWGRc/q+F"
        "3Rx5jT/9Hx/0/xvG4f9h+n8Y+m+AsAeOGLn/H63RA/s/SfiB/+MU/h+C9yg3NT396G4WOWVddD2LCmEz3wZIc02rSCl1rl7okNG4Eq+m"
        "df78rZAblfsrqlIqLZUXVys25wvmVd3WWW5kWyvtLM0lvbb7xSSBp6Q05jmrlH5wBSm3JFjTNrtafnP6QnZbld2K3Ub1SleifFNNZgsR"
        "L1M/Kf6Jr/tkpLjPLFX2t0eb8QOvCAAAAAAAAAAAAAAAAAAAnBhfRs+uNA=="
    ),
    "00001.tar": (
        "eNrt199ugjAUBnDcLuZjGK6naRHJslsfhHSlDia0hlP2N3vevcZO0QujS3YxQ+L8fklTPOhpjP0EdKn81LeqslPB5My7tbEUnVJonKVp"
        "P7PDWYh07zjUpcwWaTQR0QA68qrl5aPLdMNjzOPr+ucB/5s+zL9brch4GjT/88P8JyKRyP+QrnbzGJG47Pw3itYnXuPX/Muj6/9cIP+D"
        "GI2QAeR/L/9P5OzA+U+P7//nSYb8D+EjLlzDv358P4m9IR/fTuJSUR4uA1zzbWe4UtnCvPJLyce1enOdD+/fKL02RfhEXWljtQnF5VJM"
        "5UyEqu2avHC6a4z1xOeSXW37iMmFOy607iWvjX305a5Armu3rcLeDH1oU1f9gv0+DZW+Q/Vu2pxKlSyycFL9Uej77LR6yIk7hy/Le/ET"
        "/xAAAAAAAAAAAAAAAHBuvgGXgrB4"
    ),
    "manifest.json": (
        "eNqtlN1u2zAMhe/zFIavm0IS9bvbPsYwBLREN0Fiu7CdbV2Rdx+lOC3aJsCAjhc29JnmIXmcvKyquh3GDuf6W1V3Q7M7UDfQetrimKa1"
        "rO84IW4p7qdjl1MCGhOSFcaiMIgNJfLG+9SADkEE10JU0lEwFFpnFCjlEgdGQJVAUCk4DccxUi4Xt6xc0NNhV3qYR9z1BR12kfpz2sOD"
        "WMt7UXAaupyRU2k6v3zA5+FY3n7CuKdU4Dj82hyof5y3/MBnssVp0+G05/M8Himjn0PEZjPt/mQZKYTIcB721DMaN7wGZWwujF+M0lJ/"
        "7Dal+MQllb6gJ0xp1z8yCxeUhnjsqJ9z4mte88wTXwD95k3x4WVVVfWennOT+3pVnco2i32MvvPTnMEus7M5R+S4n3HMHTF/nV1psZDX"
        "obWnJllQGh1Hct5QDNSyk02TtKTYJgEqUqNlkm20WkVrW4PMkKSJi8S7saV9gx+nZNxR19A4LYNVixlv56oe2naibLaR6m5hyxBWX0Ac"
        "I6hl/hzeCJAewJ7PP8rtdM5eKl7VkAbsB5FlTVdEALQ1Rvvgr6ksX94nCd61+CAh7U0JAzyIdkq9k1gtl6L12W/5j367BC2maKXmn2uU"
        "ILxDAi3RGZAJGgwBjJBS2QaNI9LgrPYgEkuAMXjNb3/dbvUf7AZ1a03KOc0NOeW/7re6+VFpaZTlfz+pv+i3vzmH9VppZcJ1t1dMTqu/"
        "jfJwNg=="
    ),
}


def write(folder: Path) -> Path:
    """The folder, written anew."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(zlib.decompress(base64.b64decode(content)))
    return folder
