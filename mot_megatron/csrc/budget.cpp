// Packing under token budgets. A bin is a micro-batch: several sequences of at most `capacity`
// tokens each that together contain at most a given budget of tokens of each tower. The budgets sum
// to the number of positions, so a full bin meets every budget exactly.
//
// Each sequence is filled first with the next documents in order. It is completed with the document
// or pair from the window whose token counts come closest to what the sequence still needs for all
// towers to run out at the same time. At the end, documents of the bin are swapped for longer ones
// that fit. Each bin starts with the next documents in order, so documents that fit poorly do not
// accumulate until the end of the epoch.
//
// Letters: K towers, W documents in the window.

#include "budget.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int64_t kNone = -1;
// Measured on corpora with 30 to 400 tokens per document and 2048 per bin: a window of 1024 reduces
// padding by a tenth but takes twice as long. More than 6 pairs do not reduce padding, because an
// overly good fit in one bin leaves worse documents for the others.
constexpr int64_t kWindow = 640;
constexpr int64_t kPairs = 6;
constexpr int64_t kStep = 7;  // slots between the first documents of pairs; coprime to kWindow
// Cost of an unfilled position, in tokens of the wrong tower. It is high because later sequences of
// the bin can still correct the mix of towers.
constexpr int32_t kWeightOfRoom = 8;
// Cost of an empty or unsuitable slot. After adding any valid cost it is still the larger one, and
// it does not overflow.
constexpr int32_t kNever = 1 << 30;
// Ensures that costs stay below (kWeightOfRoom + 3) * positions < kNever.
constexpr int64_t kMostPositions = 1 << 25;
// Not a multiple of the page size, or the columns would evict each other from the L1 cache.
constexpr int64_t kStride = kWindow + 16;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_VECTOR_WIDTH
#endif

// The ideal token counts of a document to add, and their upper limits.
struct Wanted {
  std::vector<int32_t> target;  // [K] ideal tokens per tower
  std::vector<int32_t> limits;  // [K] maximum tokens per tower
  int32_t room;                 // maximum tokens in total
};

struct Found {
  int64_t slot = kNone;
  int32_t cost = kNever;
};

// Returns the slot with the lowest cost among the documents that fit; the first one on ties.
// lengths: [W]; columns: [K, kStride] tokens per tower; costs: [W], overwritten.
FOR_EVERY_VECTOR_WIDTH
Found nearest(const int32_t* __restrict lengths, const int32_t* __restrict columns,
              int64_t towers, const int32_t* target, const int32_t* limits, int32_t room,
              int32_t* __restrict costs) {
  for (int64_t slot = 0; slot < kWindow; ++slot) {
    const int32_t left = room - lengths[slot];
    costs[slot] = left < 0 ? kNever : kWeightOfRoom * left;
  }
  for (int64_t tower = 0; tower < towers; ++tower) {
    const int32_t* __restrict column = columns + tower * kStride;
    const int32_t wanted = target[tower];
    const int32_t limit = limits[tower];
    for (int64_t slot = 0; slot < kWindow; ++slot) {
      const int32_t missing = wanted - column[slot];
      const int32_t distance = missing < 0 ? -missing : missing;
      costs[slot] = (costs[slot] + distance) | (column[slot] > limit ? kNever : 0);
    }
  }
  int32_t best = kNever;
  for (int64_t slot = 0; slot < kWindow; ++slot) best = std::min(best, costs[slot]);
  if (best >= kNever) return {};
  return {std::find(costs, costs + kWindow, best) - costs, best};
}

// Token counts per tower of all documents, [documents, K].
struct Documents {
  const int32_t* counts;
  int64_t size;
  int64_t towers;

  const int32_t* operator[](int64_t document) const { return counts + document * towers; }
  int32_t length(int64_t document) const {
    int32_t sum = 0;
    for (int64_t tower = 0; tower < towers; ++tower) sum += (*this)[document][tower];
    return sum;
  }
};

// The next W documents not yet in a bin, each in a slot. Removing a document refills its slot.
class Window {
 public:
  explicit Window(const Documents& documents)
      : documents_(documents),
        slot_of_(documents.size, kNone),
        held_(kWindow, kNone),
        lengths_(kWindow, kNever),
        columns_(documents.towers * kStride),
        costs_(kWindow) {
    for (int64_t slot = 0; slot < kWindow; ++slot) refill(slot);
  }

  // Returns the slot of the first remaining document, or kNone.
  int64_t first() {
    while (first_ < next_ && slot_of_[first_] == kNone) ++first_;
    return first_ < next_ ? slot_of_[first_] : kNone;
  }

  int64_t document(int64_t slot) const { return held_[slot]; }
  int64_t slot_of(int64_t document) const { return slot_of_[document]; }
  int32_t length(int64_t slot) const { return lengths_[slot]; }

  bool fits(int64_t slot, const std::vector<int32_t>& limits, int32_t room) const {
    if (held_[slot] == kNone || lengths_[slot] > room) return false;
    for (int64_t tower = 0; tower < documents_.towers; ++tower) {
      if (columns_[tower * kStride + slot] > limits[tower]) return false;
    }
    return true;
  }

  // Returns the best document, ignoring the slot `without` if given.
  Found find(const Wanted& wanted, int64_t without = kNone) {
    const int32_t kept = without == kNone ? 0 : lengths_[without];
    if (without != kNone) lengths_[without] = kNever;
    const Found found =
        nearest(lengths_.data(), columns_.data(), documents_.towers, wanted.target.data(),
                wanted.limits.data(), wanted.room, costs_.data());
    if (without != kNone) lengths_[without] = kept;
    return found;
  }

  void remove(int64_t slot) {
    slot_of_[held_[slot]] = kNone;
    refill(slot);
  }

  // Replaces the slot's document with one that was removed earlier.
  void replace(int64_t slot, int64_t document) {
    slot_of_[held_[slot]] = kNone;
    put(slot, document);
  }

 private:
  void refill(int64_t slot) {
    if (next_ < documents_.size) {
      put(slot, next_++);
    } else {
      held_[slot] = kNone;
      lengths_[slot] = kNever;
    }
  }

  void put(int64_t slot, int64_t document) {
    held_[slot] = document;
    slot_of_[document] = static_cast<int32_t>(slot);
    lengths_[slot] = documents_.length(document);
    for (int64_t tower = 0; tower < documents_.towers; ++tower) {
      columns_[tower * kStride + slot] = documents_[document][tower];
    }
    first_ = std::min(first_, document);
  }

  const Documents& documents_;
  int64_t first_ = 0;  // lower bound on the remaining documents
  int64_t next_ = 0;   // first document that has not been in the window yet
  std::vector<int32_t> slot_of_;
  std::vector<int64_t> held_;  // document in each slot
  std::vector<int32_t> lengths_;
  std::vector<int32_t> columns_;
  std::vector<int32_t> costs_;
};

struct BinShape {
  std::vector<int32_t> budgets;
  int64_t sequences;
  int32_t capacity;
  int64_t positions() const { return sequences * capacity; }
};

class Packer {
 public:
  Packer(const Documents& documents, const BinShape& shape)
      : documents_(documents), shape_(shape), window_(documents) {
    for (int64_t i = 0; i < documents.size; ++i) {
      const int32_t length = documents.length(i);
      if (length < 1 || length > shape.capacity) throw std::out_of_range("document length");
      for (int64_t tower = 0; tower < documents.towers; ++tower) {
        if (documents[i][tower] < 0 || documents[i][tower] > shape.budgets[tower]) {
          throw std::out_of_range("tower's tokens of a document");
        }
      }
      tokens_ += length;
      shortest_ = std::min(shortest_, length);
    }
  }

  void run() {
    order.reserve(documents_.size);
    while (static_cast<int64_t>(order.size()) < documents_.size) {
      fill_bin();
      for (const auto& sequence : bin_) {
        order.insert(order.end(), sequence.begin(), sequence.end());
        offsets.push_back(order.size());
      }
    }
  }

  std::vector<int64_t> order;
  std::vector<int64_t> offsets{0};  // sequence boundaries in order, over all bins

 private:
  void fill_bin() {
    left_ = shape_.budgets;
    unfilled_ = shape_.positions();
    rooms_.assign(shape_.sequences, shape_.capacity);
    bin_.assign(shape_.sequences, {});
    for (int64_t sequence = 0; sequence < shape_.sequences; ++sequence) {
      // Stop when there is room for fewer than 2.5 documents of mean length: adding another one
      // could leave too little room for a typical pair.
      while (2 * rooms_[sequence] * documents_.size >= 5 * tokens_ || bin_[0].empty()) {
        const int64_t slot = window_.first();
        if (slot == kNone || !window_.fits(slot, left_, rooms_[sequence])) break;
        take(slot, sequence);
      }
      while (complete(sequence)) {
      }
    }
    while (unfilled_ > 0 && swap_once()) {
    }
  }

  void take(int64_t slot, int64_t sequence) {
    const int64_t document = window_.document(slot);
    bin_[sequence].push_back(document);
    use(document, sequence, 1);
    window_.remove(slot);
  }

  void use(int64_t document, int64_t sequence, int32_t sign) {
    const int32_t length = sign * documents_.length(document);
    rooms_[sequence] -= length;
    unfilled_ -= length;
    for (int64_t tower = 0; tower < documents_.towers; ++tower) {
      left_[tower] -= sign * documents_[document][tower];
    }
  }

  // Returns what the sequence still needs so that the budgets left for the other sequences keep
  // the proportions of the bin's budgets.
  Wanted finish(int64_t sequence) const {
    Wanted wanted{left_, left_, rooms_[sequence]};
    const int64_t others = unfilled_ - rooms_[sequence];
    for (int64_t tower = 0; tower < documents_.towers; ++tower) {
      wanted.target[tower] -= others * shape_.budgets[tower] / shape_.positions();
    }
    return wanted;
  }

  // Adds the best document or pair to the sequence. Returns false if none fits.
  bool complete(int64_t sequence) {
    if (rooms_[sequence] < shortest_) return false;
    const Wanted wanted = finish(sequence);
    Found best = window_.find(wanted);
    if (best.slot == kNone) return false;
    int64_t second = kNone;
    for (int64_t i = 0; i < kPairs && best.cost > 0; ++i) {
      cursor_ = (cursor_ + kStep) % kWindow;
      const int64_t slot = cursor_;
      if (!window_.fits(slot, wanted.limits, wanted.room)) continue;
      if (wanted.room - window_.length(slot) < shortest_) continue;
      const Found found = window_.find(less(wanted, slot), slot);
      if (found.cost >= best.cost) continue;
      best = {slot, found.cost};
      second = window_.document(found.slot);
    }
    take(best.slot, sequence);
    if (second != kNone) take(window_.slot_of(second), sequence);
    return true;
  }

  Wanted less(Wanted wanted, int64_t slot) const {
    const int32_t* counts = documents_[window_.document(slot)];
    for (int64_t tower = 0; tower < documents_.towers; ++tower) {
      wanted.target[tower] -= counts[tower];
      wanted.limits[tower] -= counts[tower];
    }
    wanted.room -= window_.length(slot);
    return wanted;
  }

  // Swaps one document of the bin for a longer one from the window, choosing the swap that gains
  // the most tokens. Returns false if no swap gains any.
  bool swap_once() {
    int64_t best_sequence = kNone, best_index = kNone, best_slot = kNone;
    int32_t best_gain = 0;
    for (int64_t sequence = 0; sequence < shape_.sequences; ++sequence) {
      if (rooms_[sequence] <= best_gain) continue;  // a swap cannot gain more than the room left
      for (size_t index = 0; index < bin_[sequence].size(); ++index) {
        const int64_t document = bin_[sequence][index];
        const int32_t length = documents_.length(document);
        Wanted wanted{left_, {}, rooms_[sequence] + length};
        for (int64_t tower = 0; tower < documents_.towers; ++tower) {
          wanted.target[tower] += documents_[document][tower];
        }
        // With the limits as the target, the lowest-cost document is the longest.
        wanted.limits = wanted.target;
        const int64_t slot = window_.find(wanted).slot;
        if (slot == kNone || window_.length(slot) - length <= best_gain) continue;
        best_sequence = sequence, best_index = index, best_slot = slot;
        best_gain = window_.length(slot) - length;
      }
    }
    if (best_gain == 0) return false;
    int64_t& held = bin_[best_sequence][best_index];
    const int64_t removed = held;
    held = window_.document(best_slot);
    use(removed, best_sequence, -1);
    use(held, best_sequence, 1);
    window_.replace(best_slot, removed);
    return true;
  }

  const Documents& documents_;
  const BinShape& shape_;
  Window window_;
  int64_t tokens_ = 0;
  int32_t shortest_ = kNever;
  int64_t cursor_ = 0;
  std::vector<std::vector<int64_t>> bin_;  // documents of each sequence
  std::vector<int32_t> rooms_;             // unfilled positions of each sequence
  std::vector<int32_t> left_;              // remaining budget of each tower
  int64_t unfilled_ = 0;                   // sum of rooms_, which equals the sum of left_
};

py::tuple pack_budget(const Array<int32_t>& counts, const std::vector<int32_t>& budgets,
                      int64_t sequences, int32_t capacity) {
  if (counts.ndim() != 2 || counts.shape(1) != static_cast<int64_t>(budgets.size()) ||
      sequences < 1 || capacity < 1 || capacity > kMostPositions / sequences) {
    throw std::invalid_argument("pack_budget: shape, sequences or capacity");
  }
  const Documents documents{counts.data(), counts.shape(0), counts.shape(1)};
  const BinShape shape{budgets, sequences, capacity};
  int64_t sum = 0;
  for (const int32_t budget : budgets) sum += budget;
  if (sum != shape.positions()) throw std::invalid_argument("pack_budget: sum of the budgets");
  std::vector<int64_t> order, offsets;
  {
    py::gil_scoped_release release;
    Packer packer(documents, shape);
    packer.run();
    order.swap(packer.order);
    offsets.swap(packer.offsets);
  }
  return py::make_tuple(Array<int64_t>(order.size(), order.data()),
                        Array<int64_t>(offsets.size(), offsets.data()));
}

}  // namespace

void register_budget(py::module_& module) {
  module.def("pack_budget", &pack_budget, py::arg("counts"), py::arg("budgets"),
             py::arg("sequences"), py::arg("capacity"));
}
