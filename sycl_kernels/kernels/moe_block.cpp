// The block for few tokens in one launch: the first work-group to come sorts the tokens and lists the tiles; then there is one
// queue of the first GEMM's tiles, the second's, and the pieces of the sum over each token's slots. jit/block_source.py puts the
// headers in front, in namespaces of their own: gate_up and down for the GEMMs, routing for the rest.
//
// A work-group waits only for what has a lower number than its own: work-groups took it that run already, so that all of
// them come to an end however few run at once.

using Record = routing::Record;

// What the work-groups share, zero in stream order before the launch.
struct Board {
  int next, arrived, ready, gate_up_tiles, down_tiles, unfinished_down;
  int unfinished_gate_up[1];    // of each expert
};

// The numbers of all work; for the lane that leads a work-group.
enum Phase { gate_up_phase, down_phase, sum_phase, end_phase };
constexpr int phase_shift = 24;    // in a record's first word, above the expert
static_assert(routing::config::most_experts <= 1 << phase_shift);

struct Queue {
  Board& board;
  const Record *gate_up_list, *down_list;
  int pieces;

  Record record_of(int number) const {
    if (number < board.gate_up_tiles) return gate_up::TileRecords::at(gate_up_list, number);
    number -= board.gate_up_tiles;
    if (number < board.down_tiles) return in_phase(down_phase, down::TileRecords::at(down_list, number));
    number -= board.down_tiles;
    return number < pieces ? in_phase(sum_phase, Record{0, number, 0, 0}) : in_phase(end_phase, Record(0));
  }

  // Asks for the next piece of work, while the one before is done.
  void request(routing::Team& team) const {
    if (team.leads()) team.hand_out(record_of(team.add(&board.next, 1)));
  }

 private:
  static Record in_phase(Phase phase, Record record) {
    record.x |= phase << phase_shift;
    return record;
  }
};

// Of a record that is received: which phase, and what the phase's own record is.
inline bool is_in(Phase phase, Record& record) {
  if (record.x >> phase_shift != phase) return false;
  record.x &= (1 << phase_shift) - 1;
  return true;
}

extern "C" MOE_XE_KERNEL_ATTRIBUTES void moe_block(
    const void* x, const void* w13, const void* shared_gate, const void* shared_up, const void* scales13, const void* zeros13,
    const float* global_scales13, const void* b13, void* h, const void* w2, const void* shared_down, const void* scales2,
    const void* zeros2, const float* global_scales2, const void* b2, void* y, const void* topk_ids, const int* expert_map, const void* weights,
    const void* shared_weights, int* tokens_per_expert, int* row_pairs, float* row_scales, void* out, void* board_words,
    void* gate_up_scratch, void* down_scratch, long x_stride, long w13_stride, long w13_expert_stride, long shared13_stride,
    long shared13_expert_stride, long b13_stride, long h_stride, long w2_stride, long w2_expert_stride, long shared2_stride,
    long shared2_expert_stride, long b2_stride, long y_stride, long topk_ids_stride, long weights_stride,
    long shared_weights_stride, long out_stride, float routed_scaling_factor, int expert_map_size, int num_tokens,
    int num_experts) {
  const long rows = long(num_tokens) * routing::slots;
  const int experts = num_experts + routing::problem::num_shared;
  const gate_up::Arguments first{x, nullptr, w13, shared_gate, shared_up, scales13, zeros13, global_scales13, b13, h, tokens_per_expert,
                                 row_pairs, row_scales, nullptr, gate_up_scratch, rows, num_tokens, rows, x_stride, w13_stride, w13_expert_stride,
                                 shared13_stride, shared13_expert_stride, b13_stride, h_stride, 0, experts};
  const down::Arguments second{h, nullptr, w2, shared_down, nullptr, scales2, zeros2, global_scales2, b2, y, tokens_per_expert, row_pairs,
                               row_scales, nullptr, down_scratch, rows, rows, rows, h_stride, w2_stride, w2_expert_stride, shared2_stride,
                               shared2_expert_stride, b2_stride, y_stride, 0, experts};
  const routing::ExpertIds ids{static_cast<const routing::problem::Id*>(topk_ids), topk_ids_stride, expert_map, expert_map_size};
  Board& board = *static_cast<Board*>(board_words);
  routing::Team team;
  gate_up::Team first_team;
  down::Team second_team;
  gate_up::TileList<gate_up::Team, gate_up::Arguments, gate_up::TileRecords> first_tiles(first, first_team);
  down::TileList<down::Team, down::Arguments, down::TileRecords> second_tiles(second, second_team);

  if (team.is_first(&board.arrived)) {
    constexpr long out_size = routing::size_of(routing::problem::output);
    routing::sort_few({ids, weights, weights_stride, shared_weights, shared_weights_stride, routed_scaling_factor, tokens_per_expert,
                       row_pairs, row_scales, nullptr, 0, static_cast<char*>(out), out_stride * out_size,
                       routing::problem::hidden_size * out_size, num_tokens, num_experts}, team);
    team.barrier();
    for (int expert = team.sub_group * team.lanes + team.lane(); expert < experts; expert += team.num_sub_groups * team.lanes)
      board.unfinished_gate_up[expert] = gate_up::TileRecords::count(gate_up::TileRecords::cut(tokens_per_expert[expert]));
    const int gate_up_tiles = first_tiles.make(), down_tiles = second_tiles.make();
    if (team.leads()) {
      board.gate_up_tiles = gate_up_tiles;
      board.down_tiles = board.unfinished_down = down_tiles;
    }
    team.let_go();
    team.publish(&board.ready, 1);
  } else if (team.leads()) {
    team.await(&board.ready);
  }

  const Queue queue{board, first_tiles.records(), second_tiles.records(), routing::slots > 1 ? num_tokens * routing::pieces_of_token : 0};
  queue.request(team);
  Record record = team.receive();
  team.take_over();
  gate_up::Mainloop first_mainloop(first, first_team);
  while (is_in(gate_up_phase, record)) {
    const gate_up::Tile tile = gate_up::TileRecords::tile_of(record);
    queue.request(team);
    first_mainloop.run(tile);
    team.let_go();
    record = team.receive();
    if (team.leads()) team.add(&board.unfinished_gate_up[tile.expert], -1);
  }
  down::Mainloop second_mainloop(second, second_team);
  while (is_in(down_phase, record)) {
    const down::Tile tile = down::TileRecords::tile_of(record);
    queue.request(team);
    if (team.leads()) team.await_zero(&board.unfinished_gate_up[tile.expert]);
    team.barrier();
    team.take_over();
    second_mainloop.run(tile);
    team.let_go();
    record = team.receive();
    if (team.leads()) team.add(&board.unfinished_down, -1);
  }
  if constexpr (routing::slots > 1) {     // one slot a token needs no sum: y is out
    if (!is_in(sum_phase, record)) return;
    const routing::CombineArguments sum{static_cast<const routing::Element<routing::problem::input>*>(y), y_stride, ids,
                                        static_cast<routing::Element<routing::problem::output>*>(out), out_stride, num_tokens,
                                        num_experts};
    if (team.leads()) team.await_zero(&board.unfinished_down);
    team.barrier();
    team.take_over();
    do {
      queue.request(team);
      routing::combine_piece(sum, team, record.y);
      record = team.receive();
    } while (is_in(sum_phase, record));
  }
}
