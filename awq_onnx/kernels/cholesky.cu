// The triangular factor of a small symmetric matrix, and the inverse of that: awq_onnx/symmetric.py makes a large
// factor of these and of products of matrices. Libraries are made for large matrices, and take many launches for a
// small one.
//
// No includes. Compiled without contraction: `fmaf` is where one rounding is meant.

constexpr int WIDEST = 64;  // rows, at most
constexpr int PITCH = WIDEST + 1;

// L L' = A in one block of threads, any number of them.
//
// matrix (n, n): A, of which the lower triangle counts. factor, inverse (n, n): L and L^-1, 0 above the diagonal.
// Where A is not positive definite, both hold NaN.
extern "C" __global__ void factor_block(const float *matrix, int n, float *factor, float *inverse) {
    __shared__ float L[WIDEST * PITCH];
    __shared__ float inverted[WIDEST * PITCH];
    const int lane = threadIdx.x, threads = blockDim.x;

    for (int at = lane; at < n * n; at += threads) {
        const int row = at / n, column = at % n;
        L[row * PITCH + column] = row >= column ? matrix[at] : 0.0f;
        inverted[row * PITCH + column] = 0.0f;
    }
    __syncthreads();

    for (int k = 0; k < n; k++) {
        const float pivot = sqrtf(L[k * PITCH + k]);
        __syncthreads();  // all have the pivot
        for (int row = k + lane; row < n; row += threads)
            L[row * PITCH + k] = row == k ? pivot : L[row * PITCH + k] / pivot;
        __syncthreads();
        const int left = n - k - 1;
        for (int at = lane; at < left * left; at += threads) {
            const int row = k + 1 + at / left, column = k + 1 + at % left;
            if (column <= row)
                L[row * PITCH + column] = fmaf(-L[row * PITCH + k], L[column * PITCH + k], L[row * PITCH + column]);
        }
        __syncthreads();
    }

    // Column after column of L^-1, each a thread's own: forward substitution.
    for (int column = lane; column < n; column += threads) {
        for (int row = column; row < n; row++) {
            float left = row == column ? 1.0f : 0.0f;
            for (int k = column; k < row; k++) left = fmaf(-L[row * PITCH + k], inverted[k * PITCH + column], left);
            inverted[row * PITCH + column] = left / L[row * PITCH + row];
        }
    }
    __syncthreads();

    for (int at = lane; at < n * n; at += threads) {
        factor[at] = L[at / n * PITCH + at % n];
        inverse[at] = inverted[at / n * PITCH + at % n];
    }
}
