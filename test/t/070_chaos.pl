# A short campaign of `make chaos`: a shop sells while everything around it breaks, and at the
# end each committed change is at central once, in order, and both sides have the same rows.
# With SM_CHAOS_SEED another sequence of faults.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl", "$FindBin::RealBin/../chaos";

use PostgreSQL::Test::Utils;
use SmChaos;
use Test::More;

my $tree = "$FindBin::RealBin/../..";
chomp(my $bin = qx{$ENV{PG_CONFIG} --bindir});
my $dir = "$PostgreSQL::Test::Utils::tmp_check/chaos";

mkdir($dir) or die "$dir: $!";
my $campaign = SmChaos->new(
	dir             => $dir,
	bin             => $bin,
	tree            => $tree,
	gateway_program => $ENV{SM_GATEWAY} || "$tree/softmobile-gateway",
	seed            => $ENV{SM_CHAOS_SEED} || 20,
	faults          => 45,
	minutes         => 2,
	pause           => 0.8);
my $verdict = eval { $campaign->run } || die($@, $campaign->evidence);

note($campaign->report);
cmp_ok($verdict->{committed}, '>', 1000, 'a shop sells while everything breaks: ' . $campaign->total . ' faults');
is($verdict->{waiting}, 0, 'everything drains by itself');
is($verdict->{lost}, 0, 'invariant 2: every committed change is at central');
is($verdict->{never_committed}, 0, 'invariants 1 and 6: and no other');
is($verdict->{doubled}, 0, 'invariant 2: none is there twice');
is($verdict->{out_of_order}, 0, 'invariant 2: per entity in order');
is($verdict->{altered}, 0, 'each as it was committed');
is($verdict->{rows_that_differ}, 0, 'both sides have the same rows');
is($verdict->{lanes_not_equal}, 0, 'verify_delivery() says so too');
is($verdict->{lanes_not_settled}, 0, 'invariant 5: settled is one range');
is($verdict->{exceptions}, 0, 'no event is left aside');
is($verdict->{conflicts}, 0, 'no conflict');
is($verdict->{forks}, 0, 'invariant 7: no number stands for two events');
diag($campaign->report, $campaign->evidence) if $campaign->wrong;
$campaign->stop;
done_testing();
