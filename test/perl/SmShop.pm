=head1 NAME

SmShop - a server of a shop, for the tests of the delivery

=head1 SYNOPSIS

  use SmShop;
  my $central = SmReceiver->new;
  my $shop = SmShop->new(url => $central->url, branches => [1, 2], conf => 'softmobile.retry_interval = 2');
  $shop->sell(1, 'S-1', 'S-2');
  $shop->comes_to("SELECT count(*) FROM softmobile.sync_outbox WHERE status = 'SENT'", 2, 'both arrive');
  $shop->stop;

=head1 DESCRIPTION

A started server whose database C<postgres> has the extension and three attached
tables, one of each priority: sale (HIGH), customer (NORMAL), draft (LOW), each
(id text, branch text, note text). Waits poll a condition and give up after
PG_TEST_TIMEOUT_DEFAULT.

=cut

package SmShop;

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

=head2 new(%options)

name; url: central_url of the server; branches: registered with it; conf: more
settings; init: options of the node's init(); install_path: of another PostgreSQL.
Short backoffs are not set: tests of time say what they need.

=cut

sub new
{
	my ($class, %options) = @_;
	my $node = PostgreSQL::Test::Cluster->new($options{name} // 'shop', exists $options{install_path} ? (install_path => $options{install_path}) : ());
	my $self = bless { node => $node }, $class;
	my $url = $options{url} // '';

	$node->init(%{ $options{init} // {} });
	$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'\n"
		  . "softmobile.central_url = '$url'\n" . ($options{conf} // ''));
	$node->start;
	$self->set_up('postgres', @{ $options{branches} // [1] });
	return $self;
}

# The extension and the tables in a database that has neither.
sub set_up
{
	my ($self, $db, @branches) = @_;

	$self->{node}->safe_psql($db, join("\n",
		'CREATE EXTENSION softmobile;',
		(map { "SELECT softmobile.register_branch('$_', 'Branch $_');" } @branches),
		(map { "CREATE TABLE $_ (id text PRIMARY KEY, branch text, note text);
			SELECT softmobile.attach('$_', '$_', branch_column => 'branch');" } qw(sale customer draft))));
	return;
}

sub node { return $_[0]{node}; }

sub sql
{
	my ($self, $sql) = @_;
	return $self->{node}->safe_psql('postgres', $sql);
}

# In one transaction, with a reason.
sub change
{
	my ($self, @commands) = @_;
	return $self->sql(join(";\n", 'BEGIN', "SET LOCAL softmobile.reason = 'venta normal'", @commands, 'COMMIT'));
}

# Rows of sale, in one transaction.
sub sell
{
	my ($self, $branch, @ids) = @_;
	return $self->change('INSERT INTO sale (id, branch) VALUES ' . join(', ', map { "('$_', '$branch')" } @ids));
}

# A number of sales, ids prefix-1 to prefix-n.
sub sell_many
{
	my ($self, $branch, $prefix, $n) = @_;
	return $self->change("INSERT INTO sale (id, branch) SELECT '$prefix-' || i, '$branch' FROM generate_series(1, $n) i");
}

# A query's result becomes this, sooner or later: a test.
sub comes_to
{
	my ($self, $query, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(1, $name) if $self->{node}->poll_query_until('postgres', $query, $expected);
	is($self->sql($query), $expected, $name);
	return 0;
}

sub result_is
{
	my ($self, $query, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is($self->sql($query), $expected, $name);
}

# Every event of a branch (or of all) is at central: a test.
sub drains
{
	my ($self, $name, $branch) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $where = defined $branch ? "AND branch_id = '$branch'" : '';

	return $self->comes_to("SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT' $where", 0, $name);
}

# What the failed events of a branch (or of all) say, as soon as there are any.
sub failure
{
	my ($self, $branch) = @_;
	my $where = defined $branch ? "AND branch_id = '$branch'" : '';
	my $query = "SELECT string_agg(DISTINCT error_message, E'\n') FROM softmobile.sync_outbox WHERE status = 'FAILED' $where";
	my $deadline = time() + $PostgreSQL::Test::Utils::timeout_default;

	while (time() < $deadline)
	{
		my $message = $self->sql($query);

		return $message if $message ne '';
		usleep(50_000);
	}
	return '';
}

# The events of a branch are FAILED with this message (a pattern): a test.
sub fails_with
{
	my ($self, $pattern, $name, $branch) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return like($self->failure($branch), $pattern, $name);
}

# What was sent with sync_run(): mode and status of the session.
sub run
{
	my ($self, $branch) = @_;
	return $self->sql("SELECT status, error_message FROM softmobile.sync_run('$branch')");
}

# Everything in the log is at a receiver, each event once in effect, each
# entity's events in their order, and settled is one range per lane: three tests.
sub all_arrived
{
	my ($self, $central, $name, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my @events = $central->events;
	my %seen;
	my %last;
	my $doubled = 0;
	my @unordered;

	foreach my $event (@events)
	{
		my $entity = "$event->{source} $event->{type} $event->{subject}";
		my $place = sprintf('%012d %018d', $event->{epochno}, $event->{sequence});

		$entity =~ s/\.(insert|update|delete) / /;
		$doubled++ if $seen{ $event->{id} }++;
		push @unordered, "$entity $place" if ($last{$entity} // '') gt $place;
		$last{$entity} = $place;
	}
	my @log = split(/\n/, $self->{node}->safe_psql($db // 'postgres', 'SELECT id FROM softmobile.outbox_event'));
	my %log = map { $_ => 1 } @log;
	my @missing = grep { !$seen{$_} } @log;
	my @foreign = grep { !$log{$_} } keys %seen;

	is_deeply([ scalar(@missing), $doubled, scalar(@foreign) ], [ 0, 0, 0 ],
		"$name: every committed event once, no other (" . scalar(@log) . ')');
	is_deeply(\@unordered, [], "$name: per entity in order");
	return;
}

# Each lane's settled numbers are one range from 1: a test.
sub settled_is_contiguous
{
	my ($self, $name, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $query = q{SELECT count(*) FROM softmobile.outbox_lane_state
		WHERE lane_id = log_id AND branch_id IS NOT NULL AND settled_all <> '{}'
		AND (settled_all <> int8multirange(int8range(1, upper(settled_all))))};

	return ok(1, $name) if $self->{node}->poll_query_until($db // 'postgres', $query, '0');
	return is($self->{node}->safe_psql($db // 'postgres', 'SELECT lane_id, settled_all FROM softmobile.outbox_lane_state'), '', $name);
}

sub worker_pid
{
	my ($self, $db) = @_;
	my $pid;

	$self->{node}->poll_query_until($db // 'postgres', 'SELECT running FROM softmobile.worker_status()');
	return $self->{node}->safe_psql($db // 'postgres', 'SELECT pid FROM softmobile.worker_status()');
}

sub stop
{
	my ($self, $mode) = @_;
	$self->{node}->stop($mode // 'fast');
	return;
}

1;
