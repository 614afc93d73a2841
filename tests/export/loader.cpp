// Runs a package of AOTInductor on ones and prints the output. With a second argument, Python's import of coarsegrad
// registers the ops first.
#include <ATen/ops/ones.h>
#include <Python.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int count, char** arguments) {
  if (count > 2) {
    Py_Initialize();
    if (PyRun_SimpleString("import coarsegrad") != 0) return 1;
    PyEval_SaveThread();  // what is called from here on may want Python
  }
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  std::cout << loader.run({at::ones({3, 8})})[0] << std::endl;
}
