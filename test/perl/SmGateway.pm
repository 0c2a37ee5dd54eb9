# A central database with a gateway in front of it, and what tests do with both.
#
#   use SmGateway;                     # exports the functions below
#   my $node = start_central();        # with the branches b1 and b2
#   my $gateway = start_gateway('--timeout', 1);
#   is_receipt(post($gateway, batch(event(1))), 1, 0, 'one event');
#   is(stop_gateway($gateway), 0);
#
# Messages of all gateways of a test go to log_file().

package SmGateway;

use strict;
use warnings;

use Carp;
use Exporter 'import';
use FindBin;
use HTTP::Tiny;
use IO::Socket::INET;
use JSON::PP;
use POSIX qw(WNOHANG _exit);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT = qw(program start_central use_central token conninfo log_file wait_until start_gateway stop_gateway event batch request post
  is_receipt is_problem received in_background hold_branch waiting raw answer_of);

my $program = $ENV{SM_GATEWAY} || "$FindBin::RealBin/../../softmobile-gateway";
my $epoch = '00000000-0000-4000-8000-000000000001';
my $patience = $PostgreSQL::Test::Utils::timeout_default;
my $ids = 0;
my ($node, $conninfo, %token);
my %running;

sub program
{
	return $program;
}

# A server with the extension and a role for the gateway; name, install_path: of another PostgreSQL.
sub start_central
{
	my (%options) = @_;
	my $name = delete $options{name} // 'central';

	$node = PostgreSQL::Test::Cluster->new($name, %options);
	$node->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
	$node->start;
	$node->safe_psql(
		'postgres', q{
		CREATE EXTENSION softmobile;
		CREATE ROLE gateway LOGIN;
		SELECT softmobile.grant_central('gateway');
	});
	use_central($node);
	$token{$_} = $node->safe_psql('postgres', "SELECT softmobile.central_create_token('{$_}', '$_')") for qw(b1 b2);
	return $node;
}

# Gateways that are started from now on stand before this node, which has a role for them.
sub use_central
{
	($node) = @_;
	$conninfo = sprintf 'host=%s port=%s dbname=postgres user=gateway', $node->host, $node->port;
	return;
}

# The token of a branch.
sub token
{
	return $token{ $_[0] };
}

# Where the gateway finds the database.
sub conninfo
{
	return $conninfo;
}

sub log_file
{
	return "$PostgreSQL::Test::Utils::log_path/gateway.log";
}

# Polls until a condition holds.
sub wait_until
{
	my ($name, $condition) = @_;
	my $until = time + $patience;

	until ($condition->())
	{
		croak "timed out waiting until $name" if time > $until;
		sleep 0.05;
	}
}

# Starts one on a port of its own; returns it when it is ready.
sub start_gateway
{
	my @arguments = @_;
	my $gateway = {};
	my $log = log_file();

	$gateway->{pid} = fork // die "fork: $!";
	if ($gateway->{pid} == 0)
	{
		open STDOUT, '>', "$log.out" or _exit(1);
		open STDERR, '>>', $log or _exit(1);
		exec $program, '--listen', '127.0.0.1:0', '--database', $conninfo, @arguments or _exit(1);
	}
	$running{ $gateway->{pid} } = $$;
	wait_until('the gateway listens', sub {
		die 'the gateway has ended: ' . slurp_file($log) if waitpid($gateway->{pid}, WNOHANG) != 0;
		return -e "$log.out" && slurp_file("$log.out") =~ /^listening on \S+:(\d+)\n/ && ($gateway->{port} = $1);
	});
	unlink "$log.out";
	return $gateway;
}

# Ends it; returns the exit status.
sub stop_gateway
{
	my ($gateway, $signal) = @_;

	kill $signal // 'TERM', delete $gateway->{signalled} ? () : $gateway->{pid};
	wait_until('the gateway ends', sub { waitpid($gateway->{pid}, WNOHANG) != 0 });
	delete $running{ $gateway->{pid} };
	return $?;
}

# An event of branch b1; attributes replace or add to the usual ones.
sub event
{
	my ($seq, %attributes) = @_;

	return {
		specversion => '1.0', id => sprintf('00000000-0000-7000-8000-%012d', ++$ids), source => '/branches/b1',
		type => 'softmobile.sale.insert', subject => "$seq", time => '2025-11-24T08:00:00Z', sequence => "$seq", lane => 'high',
		epoch => $epoch, epochno => '10', reason => 'Venta', data => { new => { folio => $seq } }, %attributes
	};
}

sub batch
{
	return encode_json([@_]);
}

sub request
{
	my ($gateway, $method, $path, $body, %headers) = @_;
	my $http = HTTP::Tiny->new(timeout => $patience, keep_alive => 0);

	%headers = (authorization => "Bearer $token{b1}", 'content-type' => 'application/cloudevents-batch+json; charset=UTF-8', %headers) if defined $body;
	delete $headers{$_} for grep { !defined $headers{$_} } keys %headers;
	return $http->request($method, "http://127.0.0.1:$gateway->{port}$path", { headers => \%headers, defined $body ? (content => $body) : () });
}

# POST /events; a header that is undef is left out, a body that is a function goes in chunks.
sub post
{
	my ($gateway, $body, %headers) = @_;
	return request($gateway, 'POST', '/events', $body, %headers);
}

sub is_receipt
{
	my ($response, $accepted, $duplicates, $name) = @_;
	my $receipt = $response->{status} == 200 ? decode_json($response->{content}) : {};

	is_deeply([ $response->{status}, $response->{headers}{'content-type'}, @$receipt{qw(accepted duplicates)} ],
		[ 200, 'application/json', $accepted, $duplicates ], $name)
	  or diag $response->{content};
	return $receipt;
}

sub is_problem
{
	my ($response, $status, $name, $detail) = @_;
	my $problem = eval { decode_json($response->{content}) } || {};

	is_deeply([ $response->{status}, $response->{headers}{'content-type'}, $problem->{status} ], [ $status, 'application/problem+json', $status ], "$status: $name")
	  or diag "$response->{status} $response->{content}";
	like($problem->{detail}, $detail, "$name: detail") if $detail;
}

# How many events are in the inbox that a condition holds for.
sub received
{
	my ($where) = @_;
	return $node->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_inbox WHERE $where");
}

# A request in a process of its own; returns a function that waits for its status and body.
sub in_background
{
	my ($code) = @_;
	my ($read, $write);
	pipe $read, $write or die "pipe: $!";
	my $pid = fork // die "fork: $!";

	if ($pid == 0)
	{
		my $response = $code->();
		syswrite $write, "$response->{status} $response->{content}";
		_exit(0);
	}
	close $write;
	return sub { my $text = do { local $/; <$read> }; waitpid $pid, 0; return $text };
}

# Holds the lock of branch b1; returns a function that lets it go.
sub hold_branch
{
	my $session = $node->background_psql('postgres');
	$session->query_safe(q{BEGIN; SELECT FROM softmobile.central_branch WHERE branch_id = 'b1' FOR UPDATE});
	return sub { $session->query_safe('COMMIT'); $session->quit };
}

# How many requests wait for a lock in the database.
sub waiting
{
	return $node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE usename = 'gateway' AND wait_event_type = 'Lock'});
}

# A connection on which something has been sent.
sub raw
{
	my ($gateway, $text) = @_;
	my $socket = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$gateway->{port}", Timeout => $patience) or die "connect: $!";

	$socket->syswrite($text);
	return $socket;
}

# All that comes until the connection is closed.
sub answer_of
{
	my ($socket) = @_;
	local $SIG{ALRM} = sub { die "no answer\n" };
	alarm $patience;
	my $text = do { local $/; <$socket> };
	alarm 0;
	return $text // '';
}

# A test that dies leaves none behind.
END
{
	local $?;
	kill 'KILL', grep { $running{$_} == $$ } keys %running;
}

1;
