# The gateway when others misbehave: clients that are slow or sly, a database that
# fails, hangs, or says no at the last moment.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use HTTP::Tiny;
use IO::Socket::INET;
use IO::Socket::IP;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use Test::More;
use Time::HiRes qw(sleep time);

my $patience = $PostgreSQL::Test::Utils::timeout_default;
my $program = program();
my $node = start_central();
my $token = token('b1');
my $head = "Host: x\r\nAuthorization: Bearer $token\r\nContent-Type: application/json\r\n";

# The status of a raw answer, or the answer.
sub status_of
{
	my ($text) = @_;
	return $text =~ /^HTTP\/1\.[01] (\d+) / ? $1 : $text;
}

# The process that serves a statement of the gateway.
sub backend
{
	my ($statement) = @_;
	return $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE usename = 'gateway' AND query LIKE '%$statement%'");
}

# ---------------------------------------------------------------------------
# Arguments

for my $size ('0', '-1', '1.5MB', '64mb', '64 MB', '2000MB', 'MB', '99999999999999999999')
{
	command_exit_is([ $program, '--max-body', $size ], 2, "refused: --max-body $size");
}
command_exit_is([ $program, '--listen', 'no-such-host.invalid:0' ], 1, 'a name that is none');

# ---------------------------------------------------------------------------
# Sly requests

my $gateway = start_gateway('--max-body', '2MB', '--max-unpacked', '2048kB');

is(status_of(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Connection: close\r\n\r\n"))), 411, 'no length');
like(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
	qr/^HTTP\/1\.1 400 .*Connection: close/s, 'two lengths');
is(status_of(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Content-Length: 2\r\nContent-Length: 4\r\n\r\n[]xx"))), 400, 'a length said twice');
is(status_of(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"))), 400, 'another transfer coding');
is(status_of(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Authorization: Bearer $token\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]"))),
	401, 'two tokens');
is(status_of(answer_of(raw($gateway, "POST /events HTTP/1.1\r\n${head}Content-Encoding: identity\r\nContent-Encoding: gzip\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]"))),
	415, 'two encodings');
for my $bad ('Bearer', 'Bearer ', "Bearer $token x", "Bearer $token,", "Bearer =$token", "Token $token", "Bearer$token")
{
	is_problem(post($gateway, '[]', authorization => $bad), 401, 'a malformed token');
}
is_receipt(post($gateway, '[]', authorization => "bearer   $token"), 0, 0, 'the scheme is written as one likes');

is(request($gateway, 'HEAD', '/health')->{status}, 200, 'HEAD /health');
is(request($gateway, 'HEAD', '/health')->{content} // '', '', 'has no body');
is(request($gateway, 'POST', '/health', '{}')->{headers}{allow}, 'GET, HEAD', 'POST /health');
is(request($gateway, 'HEAD', '/events')->{status}, 405, 'HEAD /events');

# A refusal reaches also those who send first and listen then.
for my $case ([ 1_000_000 => 401 ], [ 3_000_000 => 413 ])
{
	my ($length, $status) = @$case;
	my $socket = raw($gateway, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: $length\r\n\r\n");
	my $left = $length;
	local $SIG{PIPE} = 'IGNORE';
	while ($left > 0)
	{
		my $sent = $socket->syswrite(' ' x ($left > 65536 ? 65536 : $left)) or last;
		$left -= $sent;
	}
	is("$left " . status_of(answer_of($socket)), "0 $status", "a wrong token and $length bytes");
}
my $asking = raw($gateway, "POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n");
is(status_of(answer_of($asking)), 401, 'who asks before sending the body is told at once');

is(request($gateway, 'GET', "/x%0a2025-01-01T00:00:00.000Z%20forged?token=s3cret")->{status}, 404, 'a path with a line break');

# A connection serves many requests, refused ones too.
{
	my $http = HTTP::Tiny->new(timeout => $patience, keep_alive => 1);
	my %headers = (authorization => "Bearer $token", 'content-type' => 'application/json');
	my $url = "http://127.0.0.1:$gateway->{port}/events";
	my @statuses = map { $http->post($url, { headers => \%headers, content => $_ })->{status} } '[]', '{', '[]';
	is("@statuses", '200 400 200', 'one connection, three requests');
}

# ---------------------------------------------------------------------------
# Errors in the database

$node->safe_psql(
	'postgres', q{
CREATE SEQUENCE fault_count;
GRANT ALL ON fault_count TO PUBLIC;
CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.reason = 'once' AND nextval('public.fault_count') = 1 THEN
		RAISE EXCEPTION 'secret of fault()' USING ERRCODE = '40001';
	ELSIF NEW.reason ~ '^fault ' THEN
		RAISE EXCEPTION 'secret of fault()' USING ERRCODE = substr(NEW.reason, 7);
	END IF;
	RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON softmobile.central_inbox DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault();
});
my $seq = 0;
for my $case (
	[ 22012 => 400 ], [ '22P05' => 400 ], [ 54000 => 413 ], [ SM403 => 403 ], [ SM999 => 500 ], [ P0001 => 500 ], [ 42501 => 500 ], [ XX000 => 500 ],
	[ 23505 => 500 ], [ 40001 => 503 ], [ '40P01' => 503 ], [ 53200 => 503 ], [ 57014 => 503 ], [ 25006 => 503 ], [ 58030 => 503 ])
{
	my ($state, $status) = @$case;
	my $response = post($gateway, batch(event(++$seq, reason => "fault $state")));
	is_problem($response, $status, "SQLSTATE $state at commit");
	is(defined $response->{headers}{'retry-after'}, $status == 503, 'Retry-After');
	unlike($response->{content}, qr/secret|SELECT|central_/, 'no SQL in the answer') if $state !~ /^SM/;
}
is(received('true'), '0', 'and nothing was stored');
is_receipt(post($gateway, batch(event(++$seq, reason => 'once'))), 1, 0, 'a serialization failure is tried again');
is($node->safe_psql('postgres', 'SELECT last_value FROM fault_count'), '2', 'once');
$node->safe_psql('postgres', 'DROP TRIGGER fault ON softmobile.central_inbox');

# What the gateway's role may not do is no fault of the branch.
$node->safe_psql('postgres', q{REVOKE EXECUTE ON FUNCTION softmobile.central_receive(text, bytea) FROM gateway});
is_problem(post($gateway, batch(event(++$seq))), 500, 'a role without rights', qr/its log says why/);
$node->safe_psql('postgres', q{GRANT EXECUTE ON FUNCTION softmobile.central_receive(text, bytea) TO gateway});
$node->safe_psql('postgres', 'ALTER EXTENSION softmobile DROP FUNCTION softmobile.central_health(); ALTER FUNCTION softmobile.central_health() RENAME TO gone');
is_problem(request($gateway, 'GET', '/health'), 500, 'health without its function');
$node->safe_psql('postgres', 'ALTER FUNCTION softmobile.gone() RENAME TO central_health');
is(request($gateway, 'GET', '/health')->{status}, 200, 'and with it');

# Fifty at once on eight connections.
my @clients = map { my $body = batch(event(++$seq)); in_background(sub { post($gateway, $body) }) } 1 .. 50;
is(scalar(grep { $_->() =~ /^200 .*"accepted" : 1/ } @clients), 50, 'fifty clients at once');
is(stop_gateway($gateway), 0, 'it ends');

# ---------------------------------------------------------------------------
# Slow clients, a slow database

$gateway = start_gateway('--connections', 1, '--timeout', 1);

my $silent = raw($gateway, '');
my $stalled = raw($gateway, "POST /events HTTP/1.1\r\n${head}Content-Length: 100\r\n\r\n[");
my $trickling = raw($gateway, "GET /health HTTP/1.1\r\nHost: x\r\n");
{
	local $SIG{PIPE} = 'IGNORE';
	my $from = time;
	while (time < $from + $patience && defined $trickling->syswrite("X: x\r\n")) { sleep 0.1 }
	cmp_ok(time - $from, '<', $patience, 'headers that trickle are cut off');
}
is(status_of(answer_of($silent)), 408, 'a client that says nothing: 408');
is(status_of(answer_of($stalled)), 408, 'one that stalls: 408');
my $idle = raw($gateway, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
unlike(answer_of($idle), qr/ 408 /, 'one that has had its answer is left without another');

# A pool at work is not a database that is down.
my $release = hold_branch();
my $client = in_background(sub { post($gateway, batch(event(++$seq))) });
wait_until('the request waits', sub { waiting() == 1 });
is(request($gateway, 'GET', '/health')->{status}, 200, 'health while all connections are at work');
$client->();
$release->();

# A database that hangs: not even its timeouts work.
my $pid = backend('central_health');
kill 'STOP', $pid;
my $from = time;
is_problem(request($gateway, 'GET', '/health'), 503, 'health, and the database hangs');
cmp_ok(time - $from, '<', 5, 'is answered nevertheless');
is_receipt(post($gateway, batch(event(++$seq))), 1, 0, 'the other connections work');
kill 'CONT', $pid;
wait_until('health is back', sub { request($gateway, 'GET', '/health')->{status} == 200 });

$pid = backend('central_receive');
kill 'STOP', $pid;
is_problem(post($gateway, batch(event(++$seq))), 503, 'a batch, and the database hangs', qr/does not answer/);
is_receipt(post($gateway, batch(event(++$seq))), 1, 0, 'the next one has another connection');
kill 'CONT', $pid;

# The end comes in time, also when the database hangs.
kill 'STOP', $pid = backend('central_receive');
$client = in_background(sub { post($gateway, batch(event(++$seq))) });
wait_until('the request has begun', sub { $node->safe_psql('postgres', 'SELECT true') && request($gateway, 'GET', '/health')->{status} == 200 });
$from = time;
is(stop_gateway($gateway), 0, 'it ends while the database hangs');
cmp_ok(time - $from, '<', 10, 'within its timeout');
kill 'CONT', $pid;
unlike($client->(), qr/^200/, 'without a receipt');

# ---------------------------------------------------------------------------
# The end, seen from a connection that is kept alive

$gateway = start_gateway();
$release = hold_branch();
$client = in_background(sub { post($gateway, batch(event(++$seq))) });
wait_until('the request waits', sub { waiting() == 1 });
my $kept = raw($gateway, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
my $answer = '';
wait_until('the first answer', sub { $kept->sysread($answer, 4096, length $answer); $answer =~ /"ok"/ });
kill 'TERM', $gateway->{pid};
wait_until('nobody is let in', sub { !IO::Socket::INET->new(PeerAddr => "127.0.0.1:$gateway->{port}") });
$kept->syswrite("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
like(answer_of($kept), qr/^HTTP\/1\.1 503 .*Connection: close/s, 'a request after SIGTERM is refused');
$release->();
like($client->(), qr/^200 /, 'one from before is finished');
$gateway->{signalled} = 1;
is(stop_gateway($gateway), 0, 'and it ends');

# ---------------------------------------------------------------------------
# Started before its database

$node->stop('fast');
$gateway = start_gateway();
is_problem(request($gateway, 'GET', '/health'), 503, 'started without a database');
$node->start;
wait_until('it finds the database', sub { request($gateway, 'GET', '/health')->{status} == 200 });
is_receipt(post($gateway, '[]'), 0, 0, 'and works');
is(stop_gateway($gateway), 0, 'and ends');

# ---------------------------------------------------------------------------
# IPv6

SKIP:
{
	my $probe = IO::Socket::IP->new(LocalHost => '::1', LocalPort => 0, Listen => 1) or skip 'no IPv6 here', 2;
	close $probe;
	$gateway = start_gateway('--listen', '[::1]:0');
	my $socket = IO::Socket::IP->new(PeerHost => '::1', PeerPort => $gateway->{port});
	$socket->syswrite("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
	is(status_of(answer_of($socket)), 200, 'over IPv6');
	is(stop_gateway($gateway), 0, 'and it ends');
}

# ---------------------------------------------------------------------------
# The log

my $lines = slurp_file(log_file());
my @odd = grep { !/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \S/ } split /\n/, $lines;
is_deeply(\@odd, [], 'every line of the log is one of the gateway\'s');
like($lines, qr/ 127\.0\.0\.1 GET \/x\?2025-01-01T00:00:00\.000Z\?forged 404 /, 'a path cannot forge lines');
like($lines, qr/ POST \/events 408 /, 'timeouts are in it');
unlike($lines, qr/$token|s3cret|Venta|folio/, 'no token, no query, no payload');

done_testing();
