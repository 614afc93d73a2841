#pragma once

#include "bytes.h"

#include "../x86/dot_pairs.h"
